"""SQL: text to statements, statements to tables and engine."""
