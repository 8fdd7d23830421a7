"""Measurements of Etude's operators and jobs; `make bench` and `make gpu` run them."""
