"""What a pass costs on this machine and how often streams are right, and the draft plan that follows.

costs.py, acceptance.py     measure the loaded model
measure.py                  both, and the prompts they are measured on
surroundings.py, probes.py  what decides how fast this machine is; small measurements of it, with verdicts
surroundings.py, probes.py  what decides how fast this machine is; small measurements of it, with verdicts
calibration.py, store.py    the result as data; its place in the user's cache directory
planner.py                  costs and acceptance -> tree and insertion; pure functions
times.py                    what recent passes took, where nothing was calibrated
machine.py                  what a measurement holds for
"""
