"""The embedded engine: many adapters mixed in one batch of a model in this process.

One thread owns the model and repeats, in `loop`:

    take new works, cancels                         from asyncio, a locked list
    tiers.between_steps()                           attach and detach, outside `route`
    for work in waiting:                            in order of arrival
        tiers.ready(keys)                           also while no slot is free, so that adapters come early
        if free slots: tiers.use(keys)              then it gets a slot; `tiers.done(keys)` when it is done with it
    found = prefixes.find(choice, ids)              keys and values of a prompt's start that were computed before
    prefill ids[found.length:-1]                    a chunk a pass, so that others' steps do not wait long
    prefixes.keep(choice, ids[:-1], keys_values)    views of a buffer that is written again: what is kept is copied
    one step for all rows, inside `route`           feeds each row's last token: of the prompt at first, so that the
                                                    first token of an answer comes out of the same batch
    picked = pick(logits, [row.picking for row in rows])
    ticket.deliver(...)                             all pieces of the step in one call

submit()    event loop: checks, `tiers.claim(keys)`; `tiers.release(keys)` when the request is over, however it ends.
            `Grammars.compiled(schema)` is awaited, off both threads, before the engine's thread sees the work.
picking     `Picking(sampling, prompt_ids, matcher, device)` is made by the engine's thread when the work gets a slot;
            `pick(logits [rows, vocab] float32, pickings) -> list[Picked]`, in the order of the rows. A `Picked` has
            `id`, `logprob`, `finish`; with finish "stop" its id ends the answer and is not part of it; with "length"
            it is the last one. `pick` may write into the logits. A row whose logits are not finite is ended before.
prefixes    when an answer ends, `keep` is called once more with prompt and answer together (all tokens fed), for the
            next turn of a chat. `forget(key)` when an adapter is unloaded. All calls from the engine's thread.
"""
