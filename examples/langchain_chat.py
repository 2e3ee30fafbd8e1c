"""LangChain: one model object for each control.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

from langchain_openai import ChatOpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")


def chat(control) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{BASE_URL}/v1",
        api_key=os.environ.get("API_KEY", "none"),
        max_tokens=60,
        extra_body={"control": control},
    )


print("off:", chat(False).invoke("Where does Lukas live?").content)
print("on: ", chat({"name": CONTROL, "strength": 0.7}).invoke("Where does Lukas live?").content)
