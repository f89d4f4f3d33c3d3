"""What a pass costs on this machine and how often a drafter is right.

costs.py, acceptance.py     measure the loaded model
measure.py                  both, and the prompts they are measured on
surroundings.py, probes.py  what decides how fast this machine is; small measurements of it, with verdicts
shapes.py                   models of well-known shapes to measure costs with
"""
