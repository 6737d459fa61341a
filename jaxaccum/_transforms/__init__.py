"""The transformations that users call: `value_and_grad`, `grad`, `microbatch`.

The user's function enters, and a function of the same arguments leaves. Each call is made a
`Program`, which `engine` runs through the loop or through the stages of a coupled loss. It imports
all rooms below, the audit among them.
"""
