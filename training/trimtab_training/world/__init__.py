"""The small world: people, base models that know them, and a control, all made from nothing and evaluated."""
