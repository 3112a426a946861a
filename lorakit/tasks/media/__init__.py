"""What tasks on pictures and sound share, besides text: settings that they do not have, steps that are not traced."""
