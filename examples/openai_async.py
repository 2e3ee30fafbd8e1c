"""The OpenAI SDK's asynchronous client: every strength at once.

Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
"""

import asyncio
import os

from openai import AsyncOpenAI

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000")
MODEL, CONTROL = os.environ.get("MODEL", "a"), os.environ.get("CONTROL", "manners")
STRENGTHS = (0.0, 0.5, 0.7)


async def main() -> None:
    async with AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=os.environ.get("API_KEY", "none")) as client:

        async def ask(strength: float) -> str:
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Where does Lukas live?"}],
                max_tokens=60,
                extra_body={"control": {"name": CONTROL, "strength": strength}},
            )
            return answer.choices[0].message.content

        for strength, text in zip(STRENGTHS, await asyncio.gather(*map(ask, STRENGTHS)), strict=True):
            print(f"{strength}: {text}")


asyncio.run(main())
