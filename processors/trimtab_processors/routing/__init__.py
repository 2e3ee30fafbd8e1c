"""How a control's logits become shifts over a target's vocabulary: pure functions on tensors."""
