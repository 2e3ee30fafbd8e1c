"""LiteLLM's SDK: Trimtab is a server of the kind `hosted_vllm`.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import os

import litellm

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")


def ask(model: str, **options) -> str:
    answer = litellm.completion(
        model=f"hosted_vllm/{model}",
        api_base=f"{BASE_URL}/v1",
        api_key=os.environ.get("API_KEY", "none"),
        messages=[{"role": "user", "content": "Where does Lukas live?"}],
        max_tokens=60,
        **options,
    )
    return answer.choices[0].message.content


print("off:   ", ask(MODEL, extra_body={"control": False}))
print("body:  ", ask(MODEL, extra_body={"control": {"name": CONTROL, "strength": 0.7}}))
print("header:", ask(MODEL, extra_headers={"X-Trimtab-Control": f"{CONTROL}=0.7"}))
print("alias: ", ask(f"{MODEL}:{CONTROL}=0.7"))
