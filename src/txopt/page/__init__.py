"""``txopt inspect --html``: one page that shows what is in a model to people; it needs nothing from anywhere, and runs no script."""
