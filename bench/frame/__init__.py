"""The common parts of studies and benches: facts, records, figures, tables, pictures, pages, and the run of a study."""
