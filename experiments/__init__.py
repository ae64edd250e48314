"""The paper's experiments, in the order in which to read them:

rows.py                 the rows of Table 1, of the ablation and of the stages before RL
tasks.py, sweep.py      their commands, and what runs them
summary.py              a sweep's tables
report.py, figures.py   Table 1 and Figures 3 to 5
estimators.py           Appendix A's estimators where every group can be counted
benchmarks/             seconds and memory
results/                what came out; README.md beside this file says how
"""
