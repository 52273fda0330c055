"""What a run says of its progress: the state behind the bar, a line for each epoch, and a hint when D wins."""

HINT_STEPS = 500  # steps in a row that D must win
HINT = (
    f"hint: for {HINT_STEPS} steps D(G(z)) was below 0.02 and the loss of G grew: D recognises all of G's images, and G"
    " learns little. More images help, a smaller --ndf, or a smaller --lr"
)


def bar_text(means):
    """Return what stands behind the progress bar: the losses, D(x), and D(G(z)) before and after D's update."""
    return "D {loss_D:.2f} G {loss_G:.2f} D(x) {D_x:.2f} D(G(z)) {D_G_z1:.2f}/{D_G_z2:.2f}".format(**means)


def epoch_summary(rows, epoch, niter):
    """Return one line on a finished epoch (1, 2, ...): means over its rows of the log."""
    rows = [row for row in rows if row["epoch"] == epoch - 1]
    names = ("loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", "images_per_s")
    means = {name: sum(row[name] for row in rows) / max(1, len(rows)) for name in names}
    return (
        "epoch {}/{}: loss_D {loss_D:.3f}, loss_G {loss_G:.3f}, D(x) {D_x:.3f}, D(G(z)) {D_G_z1:.3f} / {D_G_z2:.3f},"
        " {images_per_s:.0f} images/s"
    ).format(epoch, niter, **means)


def D_wins(rows):
    """Return whether, in the last HINT_STEPS steps of the log's rows, D(G(z)) was below 0.02 and the loss of G grew."""
    rows = [row for row in rows if row["step"] > rows[-1]["step"] - HINT_STEPS]
    middle = len(rows) // 2
    steps = rows[-1]["step"] - rows[0]["step"] + rows[1]["step"] - rows[0]["step"] if middle else 0
    if steps < 0.8 * HINT_STEPS or any(row["D_G_z1"] >= 0.02 for row in rows):
        return False
    return sum(row["loss_G"] for row in rows[-middle:]) > sum(row["loss_G"] for row in rows[:middle])
