"""What balancesync takes, beside what the same work takes at the least: see docs/performance.md."""
