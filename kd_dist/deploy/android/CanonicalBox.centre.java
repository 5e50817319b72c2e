package dev.kd_dist.student;

/** The part of an image that the student sees: its largest centred box of the student's aspect ratio. */
public final class CanonicalBox {
    private CanonicalBox() {}

    /** Left, top, right and bottom edge in pixels, of an image of `width` x `height`. */
    public static int[] of(int width, int height) {
        long w = StudentInfo.WIDTH;
        long h = StudentInfo.HEIGHT;
        int high = (int) Math.min(height, Math.max(1, (2 * width * h + w) / (2 * w)));
        int wide = (int) Math.min(width, Math.max(1, (2 * height * w + h) / (2 * h)));
        int left = (width - wide) / 2;
        int top = (height - high) / 2;
        return new int[] {left, top, left + wide, top + high};
    }
}
