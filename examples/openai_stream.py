"""The OpenAI SDK, streaming: a plain answer and a controlled one, word by word.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

from openai import OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key=os.environ.get("API_KEY", "none"))
for control in (False, {"name": CONTROL, "strength": 0.7}):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Where does Lukas live?"}],
        max_tokens=60,
        stream=True,
        extra_body={"control": control},
    )
    print("off:  " if not control else "on:   ", end="")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
