"""KalamDB: an SQL-first realtime database for Python programs whose users have private data."""
