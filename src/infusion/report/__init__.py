"""Self-contained HTML pages: pictures inlined, no scripts, no network."""
