"""Other systems that fastmerge works with; each module needs its extra, and is imported when asked for."""
