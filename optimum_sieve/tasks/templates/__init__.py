"""Text of a row: `template.RowTemplate` renders jinja2 in the `sandbox`, `function.RowFunction` calls Python code."""
