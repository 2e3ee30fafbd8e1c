"""Trains a control beside a frozen model, from a recipe. Nothing in it knows the small world."""
