"""What a pass costs on this machine and how often a drafter is right.

costs.py, acceptance.py     measure the loaded model
measure.py                  both, and the prompts they are measured on
shapes.py                   models of well-known shapes to measure costs with
"""
