"""`trimtab similarity`: compares the shifts that fine-tuning makes in different models."""
