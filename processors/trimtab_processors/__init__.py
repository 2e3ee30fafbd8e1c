"""The control runtime: small models whose logits shift those of large ones."""
