"""What a recipe will cost, before it is run: `plan` puts it together, `page` shows it."""
