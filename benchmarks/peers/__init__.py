"""
Systems that keep a training state each step, ours and others', behind one small interface.

system.py    the interface             lm_resiliency.py, dlrover.py, nvrx.py, torchsnapshot.py, torch_native.py: others
ours.py      snapshotd                 trainer.py: the process that trains and measures one family of systems

A family is a module with `systems(setting) -> list[System]`, and `early(home, rank, world)` where it forks. Each is
measured in a process of its own (some patch signals or keep threads), beside plain steps of the same process.
"""
