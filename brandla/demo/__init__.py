"""The demo: a tracking study and a training study on real data, with tables, a picture and a JSON of all figures."""
