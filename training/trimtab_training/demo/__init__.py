"""The demo: the small world served, asked over HTTP and measured."""
