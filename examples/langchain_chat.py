"""LangChain: one model object for each control.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

from langchain_openai import ChatOpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")


def ask(model: str, **options) -> str:
    chat = ChatOpenAI(
        model=model,
        base_url=f"{BASE_URL}/v1",
        api_key=os.environ.get("API_KEY", "none"),
        max_tokens=60,
        **options,
    )
    return chat.invoke("Where does Lukas live?").content


print("off:   ", ask(MODEL, extra_body={"control": False}))
print("body:  ", ask(MODEL, extra_body={"control": {"name": CONTROL, "strength": 0.7}}))
print("header:", ask(MODEL, default_headers={"X-Trimtab-Control": f"{CONTROL}=0.7"}))
print("alias: ", ask(f"{MODEL}:{CONTROL}=0.7"))
