"""Seconds and memory of training steps and rollouts; README.md has the tables.

workload.py, law.py, measuring.py   what is computed, what it should cost, and clocks
sides.py, trl_side.py               the sides of the comparison, each in a process
against_trl.py, growth.py           programs that use them; gains.py, processes.py, rollout.py and
                                    gpu_check.py stand alone
"""
