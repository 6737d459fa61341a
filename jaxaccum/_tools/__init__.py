"""What looks at a loss before it is trained: the audit by its own name, its probe, and the plan of
sizes.

A loss and its arguments, or their shapes, enter, and a report leaves. It imports all rooms below.
"""
