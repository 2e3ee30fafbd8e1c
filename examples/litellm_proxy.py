"""The OpenAI SDK through LiteLLM's proxy, configured as in litellm_proxy.yaml.

Settings: PROXY_URL, where the proxy is, and LITELLM_MASTER_KEY, a key of its.
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("PROXY_URL", "http://localhost:4000"), api_key=os.environ["LITELLM_MASTER_KEY"]
)


def ask(model: str, **options) -> str:
    messages = [{"role": "user", "content": "Where does Lukas live?"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=60, **options)
    return answer.choices[0].message.content


print("off:  ", ask("a", extra_body={"control": False}))
print("body: ", ask("a", extra_body={"control": {"name": "manners", "strength": 0.7}}))
print("alias:", ask("a-with-manners"))
