"""Emoji in drawn scenes: what the embedded image model learned from, and how its pictures are judged.

captions      what a picture is called, and which pairs of object and background the base model never saw
backgrounds   plain colours and drawn scenes
pictures      emoji pasted into them
styles        pictures as ink drawings, neon lines and in two colours, which the base model never draws
judge         a small classifier that names the object and the background of a picture
"""
