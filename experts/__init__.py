"""Experts behind APIs."""

from experts.roster import make_experts, try_out  # noqa: F401
