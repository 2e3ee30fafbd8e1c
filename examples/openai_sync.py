"""The OpenAI SDK: the same question without control, and with it in each of three ways.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")
MESSAGES = [{"role": "user", "content": "Where does Lukas live?"}]

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key=os.environ.get("API_KEY", "none"))


def ask(model: str, **options) -> str:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=60, **options)
    return answer.choices[0].message.content


print("off:   ", ask(MODEL, extra_body={"control": False}))
print("body:  ", ask(MODEL, extra_body={"control": {"name": CONTROL, "strength": 0.7}}))
print("header:", ask(MODEL, extra_headers={"X-Trimtab-Control": f"{CONTROL}=0.7"}))
print("alias: ", ask(f"{MODEL}:{CONTROL}=0.7"))

# What was applied stands in a header of the answer.
raw = client.chat.completions.with_raw_response.create(
    model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"control": CONTROL}
)
print("applied:", raw.headers["x-trimtab-control"])
