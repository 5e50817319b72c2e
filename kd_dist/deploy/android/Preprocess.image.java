package dev.kd_dist.student;

/**
 * A decoded image as the student takes it: the box of {@link CanonicalBox}, scaled to the student's size and divided by
 * 255. Every level is the same as in training, whatever the size of the image.
 *
 * <p>Scaling is Pillow's: a triangle as wide as the ratio of the sizes when it shrinks, else two pixels wide; weights of
 * 22 bits; across, then down, each rounded to a level. Near the edges of the box it looks at pixels beyond them.
 *
 * <p>Plain Java 8, without Android; safe to call from any thread.
 */
public final class Preprocess {
    private static final int BITS = 22;

    private Preprocess() {}

    /**
     * Pixels of an image, row by row, 0xAARRGGBB as Bitmap.getPixels gives them (A is not looked at), to the student's
     * input of StudentInfo.INPUT_SHAPE: red, green, blue, each row by row, from 0 to 1.
     */
    public static float[] input(int[] argb, int width, int height) {
        byte[] levels = levels(argb, width, height);
        float[] input = new float[levels.length];
        for (int i = 0; i < levels.length; i++) {
            input[i] = (levels[i] & 0xff) / 255f;
        }
        return input;
    }

    /** The levels, 0 to 255, that {@link #input} divides by 255: red, green, blue, each row by row. */
    public static byte[] levels(int[] argb, int width, int height) {
        if (width < 1 || height < 1 || (long) width * height != argb.length) {
            throw new IllegalArgumentException(argb.length + " pixels are no image of " + width + " x " + height);
        }
        int[] box = CanonicalBox.of(width, height);
        Taps across = new Taps(width, box[0], box[2], StudentInfo.WIDTH);
        Taps down = new Taps(height, box[1], box[3], StudentInfo.HEIGHT);
        int top = down.first[0];
        int bottom = down.first[StudentInfo.HEIGHT - 1] + down.weights[StudentInfo.HEIGHT - 1].length;
        int row = 3 * StudentInfo.WIDTH;
        byte[] narrow = new byte[(bottom - top) * row];
        for (int y = top; y < bottom; y++) {
            across(argb, y * width, across, narrow, (y - top) * row);
        }
        byte[] levels = new byte[StudentInfo.HEIGHT * row];
        for (int y = 0; y < StudentInfo.HEIGHT; y++) {
            down(narrow, (down.first[y] - top) * row, down.weights[y], levels, y * StudentInfo.WIDTH);
        }
        return levels;
    }

    /** One row of pixels to one of the student's width, with the three levels of a pixel side by side. */
    private static void across(int[] argb, int start, Taps taps, byte[] narrow, int at) {
        for (int x = 0; x < StudentInfo.WIDTH; x++) {
            int[] weights = taps.weights[x];
            int from = start + taps.first[x];
            int red = 1 << (BITS - 1);
            int green = red;
            int blue = red;
            for (int i = 0; i < weights.length; i++) {
                int pixel = argb[from + i];
                red += weights[i] * (pixel >> 16 & 0xff);
                green += weights[i] * (pixel >> 8 & 0xff);
                blue += weights[i] * (pixel & 0xff);
            }
            narrow[at++] = level(red);
            narrow[at++] = level(green);
            narrow[at++] = level(blue);
        }
    }

    /** As many narrow rows as there are weights to one row of each of the three planes. */
    private static void down(byte[] narrow, int start, int[] weights, byte[] levels, int at) {
        int row = 3 * StudentInfo.WIDTH;
        for (int i = 0; i < row; i++) {
            int sum = 1 << (BITS - 1);
            for (int y = 0; y < weights.length; y++) {
                sum += weights[y] * (narrow[start + y * row + i] & 0xff);
            }
            levels[i % 3 * StudentInfo.HEIGHT * StudentInfo.WIDTH + at + i / 3] = level(sum);
        }
    }

    private static byte level(int sum) {
        return (byte) Math.max(0, Math.min(255, sum >> BITS));
    }

    /** Which pixels of a side, and how much of each, make each pixel of the scaled side. */
    private static final class Taps {
        final int[] first;
        final int[][] weights;

        /** A side of `length` pixels, of which `low` to `high` become `scaled` pixels. */
        Taps(int length, int low, int high, int scaled) {
            first = new int[scaled];
            weights = new int[scaled][];
            double ratio = (double) (high - low) / scaled;
            double reach = Math.max(1.0, ratio);
            for (int i = 0; i < scaled; i++) {
                double centre = low + (i + 0.5) * ratio;
                first[i] = Math.max(0, (int) (centre - reach + 0.5));
                double[] shares = new double[Math.min(length, (int) (centre + reach + 0.5)) - first[i]];
                double sum = 0;
                for (int k = 0; k < shares.length; k++) {
                    double distance = Math.abs((k + first[i] - centre + 0.5) * (1.0 / reach));
                    shares[k] = Math.max(0.0, 1.0 - distance);
                    sum += shares[k];
                }
                weights[i] = new int[shares.length];
                for (int k = 0; k < shares.length; k++) {
                    weights[i][k] = (int) (0.5 + shares[k] / sum * (1 << BITS));
                }
            }
        }
    }
}
