"""The demo: a tracking and a training study on real data, with tables, a picture and a JSON file of all figures."""
