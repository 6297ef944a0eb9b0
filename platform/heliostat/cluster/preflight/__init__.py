"""What is wrong with a cluster, found before anything runs on it: every node is asked, then judged.

Each file but `survey` and `inspector` holds one thing that can be wrong: the values that are
measured, and a function from those of all nodes to findings.
"""
