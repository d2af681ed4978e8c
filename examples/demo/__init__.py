"""
`make demo`: train a GPT on four "nodes" of this machine, kill what can be killed, and compare bit by bit.

processes.py   children with logs, ended by pid        faults.py    what is killed, and when it counts as survived
cluster.py     coordinator, daemons, launchers         view.py      the live view, or plain lines
records.py     what a training run leaves behind       report.py    the table and the verdict, for people
watch.py       what coordinator and run say now        verdict.py   pure: are two runs the same?
"""
