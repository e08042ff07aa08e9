"""Neurons and heads: what their removal is predicted to cost, and how they are removed."""
