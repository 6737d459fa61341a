"""What looks at a loss before it is trained: the audit, its numeric probe, and the plan of sizes.

A loss and its arguments, or their shapes, enter, and a report leaves. It imports all rooms below.
"""
