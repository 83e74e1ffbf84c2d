"""The paper's questions on real data: a queue of jobs, each job's result, and docs/findings.md from these results."""
