"""Stages that several systems share."""
