"""The gateway: one OpenAI-compatible service in front of vLLM servers that a control can steer."""
