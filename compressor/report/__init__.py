"""What a person reads afterwards: one schema, and three renderings of it (report.json, report.html, the model card)."""
