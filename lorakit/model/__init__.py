"""Work with adapters on a live model: attach, capture, activate, merge, route, detach and summary, one file each.

Every function takes the model first and changes it in place. All state is in one `state.State` object stored on the
model itself: there is no global state and no wrapper.
"""
