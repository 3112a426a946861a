"""The embedded engine: many adapters mixed in one batch of a model in this process.

One thread owns the model and repeats, in `loop`:

    take new requests                               from asyncio, a deque
    tiers.between_steps()                           attach and detach, outside `route`
    drop what was cancelled or is past its deadline
    for request in waiting:                         in order of arrival
        tiers.ready(keys)                           also while no row is free, so that adapters come early
        if a row is free: tiers.use(keys)           `tiers.done(keys)` when it is done with it
    found = prefixes.find(choice, ids)              keys and values of a prompt's start that were computed before
    prefill ids[found.length:-1]                    a chunk a pass, so that others' steps do not wait long; equal
                                                    prompts with equal adapters (the answers of `n`) once
    prefixes.keep(choice, ids[:-1], keys_values)    views of a buffer that is written again: what is kept is copied
    batches.arrange()                               rows by classes of length, as each reads as far as the longest
    for each batch: one step inside `route`         feeds each row's last token: of the prompt at first, so that the
                                                    first token of an answer comes out of the same batch
        picked = pick(logits, [row.picking for row in rows])
    ticket.deliver(...)                             all pieces of the pass in one call

submit()    event loop: checks, `tiers.claim(keys)`; `tiers.release(keys)` when the request is over, however it ends.
            `Grammars.compiled(schema)` is awaited, off both threads, before the engine's thread sees the request, and
            cancelled with it.
picking     `Picking(sampling, prompt_ids, matcher, device)` is made by the engine's thread when the request gets a row;
            `pick(logits [rows, vocab] float32, pickings) -> list[Picked]`, in the order of the rows. A `Picked` has
            `id`, `logprob`, `finish`, `error`; the id is None if it was a stop token. The
            logits are not changed. A row whose logits are not finite gets an `error`, and its keys are overwritten.
prefixes    when an answer ends, `keep` is called once more with prompt and answer together (all tokens fed), for the
            next turn of a chat. `forget(key)` when an adapter has been unloaded. All calls from the engine's thread.
"""
