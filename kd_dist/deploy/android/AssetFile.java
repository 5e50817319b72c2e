package dev.kd_dist.student;

import android.content.Context;
import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;

/** An asset of the app as a file, for libraries that read no assets. */
final class AssetFile {
    private AssetFile() {}

    /**
     * The path of the asset `name`, which is copied to the app's own files unless it was before. Another model has
     * another `sha256`, and takes the place of the one before. These files are not backed up: a backup that has more
     * than 25 MB is none.
     */
    static synchronized String path(Context context, String name, String sha256) throws IOException {
        File folder = context.getNoBackupFilesDir();
        File file = new File(folder, sha256 + "-" + name);
        if (!file.exists()) {
            File part = new File(folder, file.getName() + ".part");
            try (InputStream from = context.getAssets().open(name);
                    FileOutputStream to = new FileOutputStream(part)) {
                byte[] buffer = new byte[1 << 16];
                for (int read = from.read(buffer); read >= 0; read = from.read(buffer)) {
                    to.write(buffer, 0, read);
                }
                to.getFD().sync();
            }
            if (!part.renameTo(file)) {
                throw new IOException(part + " cannot be renamed to " + file);
            }
        }
        File[] found = folder.listFiles();
        for (File one : found == null ? new File[0] : found) {
            boolean copy = one.getName().endsWith("-" + name) && one.getName().length() == file.getName().length();
            if (copy && !one.equals(file) && !one.delete()) {
                throw new IOException(one + " cannot be deleted");
            }
        }
        return file.getPath();
    }
}
