"""The OpenAI SDK through LiteLLM's proxy, configured as in litellm_proxy.yaml.

Settings: LITELLM_MASTER_KEY, a key of the proxy's; with what fits `make demo`: PROXY_URL, MODEL, CONTROL.
"""

import os

from openai import OpenAI

PROXY_URL = os.environ.get("PROXY_URL", "http://localhost:4000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")

client = OpenAI(base_url=PROXY_URL, api_key=os.environ["LITELLM_MASTER_KEY"])


def ask(model: str, **options) -> str:
    messages = [{"role": "user", "content": "Where does Lukas live?"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=60, **options)
    return answer.choices[0].message.content


print("off:   ", ask(MODEL, extra_body={"control": False}))
print("body:  ", ask(MODEL, extra_body={"control": {"name": CONTROL, "strength": 0.7}}))
print("header:", ask(MODEL, extra_headers={"X-Trimtab-Control": f"{CONTROL}=0.7"}))
print("alias: ", ask(f"{MODEL}:{CONTROL}=0.7"))
print("named: ", ask("a-with-manners"))
