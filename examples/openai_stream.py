"""The OpenAI SDK, streaming: a plain answer and controlled ones, word by word.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key=os.environ.get("API_KEY", "none"))


def show(label: str, model: str, **options) -> None:
    messages = [{"role": "user", "content": "Where does Lukas live?"}]
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=60, stream=True, **options
    )
    print(label, end=" ")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


show("off:   ", MODEL, extra_body={"control": False})
show("body:  ", MODEL, extra_body={"control": {"name": CONTROL, "strength": 0.7}})
show("header:", MODEL, extra_headers={"X-Trimtab-Control": f"{CONTROL}=0.7"})
show("alias: ", f"{MODEL}:{CONTROL}=0.7")
