"""The Anthropic SDK on `/v1/messages`, which vLLM answers too.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

from anthropic import Anthropic

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")

client = Anthropic(base_url=BASE_URL, auth_token=os.environ.get("API_KEY", "none"))


def ask(model: str, **options) -> str:
    answer = client.messages.create(
        model=model,
        max_tokens=60,
        messages=[{"role": "user", "content": "Where does Lukas live?"}],
        **options,
    )
    return answer.content[0].text


print("off:   ", ask(MODEL, extra_body={"control": False}))
print("body:  ", ask(MODEL, extra_body={"control": {"name": CONTROL, "strength": 0.7}}))
print("header:", ask(MODEL, extra_headers={"X-Trimtab-Control": f"{CONTROL}=0.7"}))
print("alias: ", ask(f"{MODEL}:{CONTROL}=0.7"))
