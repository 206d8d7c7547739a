"""What every study and bench shares: facts, records, figures, tables, pictures, pages, and the run of a study."""
