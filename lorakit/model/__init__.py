"""An adapter meets a live model: attach, capture, activate, merge, route, detach, summary, a file each.

Every function takes the model first and changes it in place. What a model carries is written in one place,
`state.State`, kept on the model itself: there is no global state and no wrapper.
"""
